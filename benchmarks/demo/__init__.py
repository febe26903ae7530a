"""SGD and LARS at growing batches on real handwritten digits. `nox -s demo` runs it."""
