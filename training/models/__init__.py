"""Backbones cut into trunk and experts, classifiers, the multi-expert net, routers."""
