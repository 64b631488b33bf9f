"""The masked linear map: definition, registered op, routed gradient, implementations."""
