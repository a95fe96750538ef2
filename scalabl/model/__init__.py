"""One forward pass: adapted layers, draws, base model plus adapter -> logits [B, K, C].

Which passes to run, and what they may leave out, is decided in `passes`.
"""
