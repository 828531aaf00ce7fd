"""The parts of `fastpose.train`: settings, optimizer and schedule, synchronised batch norm, what a run writes."""
