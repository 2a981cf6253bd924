"""Weft: one frozen base model, many LoRA adapters, one batch."""
