"""The masked linear map in Triton."""
