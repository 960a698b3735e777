"""What discovery cannot find out from a running model, as data: facts that a small probe would not show."""

SHARED_STATE = {
    "num_kv_shared_layers": "lets later blocks reuse the keys and values of earlier ones",
}
"""Configuration attribute -> what it makes a family do, where that rules out treating blocks one by one.

The attribute counts layers from the end, so a shortened probe has a different structure.
"""
