"""General model servers and a plain FastAPI endpoint, with all experts as one graph: what routing is compared with."""
