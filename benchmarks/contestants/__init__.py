"""General model servers and a plain FastAPI endpoint, serving all experts as one graph: what routing is compared with."""
