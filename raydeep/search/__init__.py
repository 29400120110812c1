"""The joint search over sparsity, bit widths and distillation."""
