"""The engine for `torch.compile`."""
