"""Training methods: PPAP, the switches of its Table 5, and the baselines HP and STEGO."""
