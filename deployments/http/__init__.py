"""All that knows HTTP: routes, access, bodies, errors, the OpenAPI document."""
