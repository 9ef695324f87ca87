"""Workers and a machine, decided before anything starts: placement, engine arguments, manifests."""
