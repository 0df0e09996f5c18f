"""Array libraries and kernels that are wrong on purpose: tests of the conformance checks."""
