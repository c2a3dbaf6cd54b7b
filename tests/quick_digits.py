"""A config for tests that start programs: few digits' worth of everything.

CrossMAE (arXiv 2401.14391) on a narrow model, with the evaluations that compile little.
"""

from configs import digits_cross


def get_config():
    """Returns the experiment."""
    config = digits_cross.get_config()
    config.model.encoder.size = "W32-D2-H2/4"
    config.model.decoder.update(dim=16, depth=1, num_heads=2)
    config.evals = {name: config.evals[name] for name in ("knn", "reconstruction")}
    config.baselines = False
    return config
