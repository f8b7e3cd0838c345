"""The published method on the demo's data, whose own policy filters by the expert ratio: fields, and options."""

FIELDS = {
    "policy.extractor": "weighted",
    "policy.extractor_params": "{}",
    "policy.score": "td",
    "policy.score_levels": "own",
    "policy.gate": "none",
}
PUBLISHED = tuple(word for name, value in FIELDS.items() for word in (f"--{name}", value))
