"""Selection, mixture and the GEM loss in Triton."""
