"""Colours, and everything that draws: strips, curves, overlays, legends, index images."""
