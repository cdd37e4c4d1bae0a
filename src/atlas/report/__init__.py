"""The page on a run: how it went, its curves, its data, samples, scores and config. It reads only files of the run's folder, and
the results that its manifest names."""
