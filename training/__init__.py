"""Train long-tailed image classifiers with several experts; knows nothing of export or serving."""
