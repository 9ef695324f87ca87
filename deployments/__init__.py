"""Embeddings at company scale, on Ray Serve and vLLM.

The life of a request:

1. ``http.ingress`` takes it; ``http.auth`` finds its key; ``http.serving`` reads its body, by a deadline.
2. ``api`` parses the body into one flat request, in the dialect of its route, or refuses it by field.
3. ``dispatch.catalog`` finds the model by its public name.
4. ``dispatch.admission`` lets it in, or says when to come again; then its key's tokens are charged.
5. ``dispatch.prepare`` turns texts into token ids, once, in one batch.
6. ``dispatch.dispatch`` cuts it into parts, or joins it with others, unless somebody waits for the same.
7. ``dispatch.calls`` sends a part when a place in flight is free, again where ``transport.outcome`` says so.
8. ``transport.router`` picks the replica; ``transport.local`` or Ray Serve's handle brings the call there.
9. ``replica`` hands the ids to its ``engine``, whose ``steps`` they share, and checks what comes back.
10. One contiguous float32 array travels back.
11. ``api.encoding`` writes it out as floats or base64, once, at the end.

The rooms, in the order in which they know of each other:

``errors``, ``metrics``, ``tracing``, ``logs``, ``priority``, ``machine``, ``durable``   what everybody shares
``config``      worker files, and what a model's folder says of it
``front``       what stands before Ray Serve: HAProxy, its guard, the spare, Ray's switches
``keys``        the key file, the ring, rate limits, what was used
``plan``        workers and a machine: engine arguments, placement, versions, manifests
``api``         the dialects
``engine``      from token ids to vectors on this machine
``transport``   a call to a replica
``replica``     one engine in a Ray Serve replica
``dispatch``    from texts to vectors, for anybody who asks
``bulk``        patience and windows: what jobs, clients and batches share
``status``      what the processes count, as the last minutes of each model
``page``        the files of the page at `/ui`
``http``        all that knows HTTP
``batches``     OpenAI's files and batches
``client``      handles for Ray programs; ``jobs`` files and tables, row by row
``app``         binds the deployments; ``command`` and ``__main__`` are the command line

This module imports nothing, so that ``import deployments`` costs nothing.
"""
