"""A package, so that its tests can share one linked client and end it with the last of them."""
