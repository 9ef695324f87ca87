"""Which paths anybody may ask, and which only an operator."""

PREFIXES = ("", "/v1")
# The parts of the documentation's page, and what they are.
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
DOCUMENTATION = ("/openapi.json", "/docs", *(f"/docs/{name}" for name in ASSETS))
# Exactly as they are written here: no client's data, no model's work.
PUBLIC = frozenset(
    prefix + path for prefix in PREFIXES for path in ("/health", "/ready", "/version", *DOCUMENTATION)
)
# What tells of all clients.
OPERATOR = frozenset(prefix + "/metrics" for prefix in PREFIXES)
