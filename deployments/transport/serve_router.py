"""The name that Ray Serve is given for `TokenRouter`.

Serve pickles the module that it is told by value, once per handle. What all of a process share has to
stand in a module that is imported; so this one holds a name and nothing else.
"""

from deployments.transport.router import TokenRouter


class ServeRouter(TokenRouter):
    """`TokenRouter`, as Ray Serve makes it."""
