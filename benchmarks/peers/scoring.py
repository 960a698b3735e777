"""Perplexity as every peer's half of a benchmark takes it."""

import torch


@torch.no_grad()
def perplexity(model, windows):
    """exp of the mean window loss, fp32, over token windows [N, L]."""
    model = model.float().eval()
    losses = []
    for ids in windows.split(4):
        logits = model(input_ids=ids, use_cache=False).logits
        losses += [
            torch.nn.functional.cross_entropy(row[:-1], window[1:]).item()
            for row, window in zip(logits, ids, strict=True)
        ]
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()
