"""Objects without labels, from the features of patches: LOST, TokenCut, MaskCut, and the refinement of their masks."""
