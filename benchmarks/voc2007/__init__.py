"""The VOC2007 classification benchmark of Wu et al. 2019, Tables 1 and 2: the reference example."""
