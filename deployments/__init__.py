"""Embeddings at company scale, on Ray Serve and vLLM.

The life of a request:

1. ``gateway.ingress`` takes the HTTP request; ``gateway.serving`` gives it a deadline.
2. ``api.openai`` parses the body into one flat request, or refuses it by field.
3. ``gateway.catalog`` finds the model by its public name.
4. ``engine.tokenizer`` turns texts into token ids, once, in one batch.
5. ``gateway.dispatch`` lets it in, joins and splits, and calls a replica, or another one if that dies;
   ``local_calls`` brings the call to one on the same node, Ray Serve's handle to any other.
6. ``replica`` hands the token ids to its ``engine`` and checks every vector that comes back.
7. One contiguous float32 array travels back to the ingress.
8. ``api.encoding`` writes it out as floats or base64, once, at the end.

This module imports nothing, so that ``import deployments`` costs nothing.
"""
