"""Networks: the frozen backbone, its weights, the streams on top, the probes, and cached features."""
