"""The verbs the flows are made of: plain functions, and thin Prefect tasks over them."""
