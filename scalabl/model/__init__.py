"""One forward pass: adapted layers, posterior draws, base model plus adapter -> logits [B, K, C].

Which passes to run, and which shortcuts they may take, is decided in `passes`.
"""
