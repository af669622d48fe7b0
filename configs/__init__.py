"""Every input and setting of Tuneline as pydantic models, and the YAML that ships with it."""
