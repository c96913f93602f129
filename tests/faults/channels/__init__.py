"""P1, P4 and P6 over the channels that fetch: real gateways, broken, the conformance suite's peers on the other side."""
