"""General JAX building blocks that know nothing about recurrent networks."""
