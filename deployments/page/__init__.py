"""The page at `/ui`: shows the cluster and lets people try its models, by nothing but the public routes."""
