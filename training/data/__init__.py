"""Image sets, long-tailed subsets, splits, augmentation and sampling."""
