"""Prune, quantize, distil: the plan that makes a network small, and the packed file it ends in."""
