"""Servers that run as processes of their own: ScalaBL's and vLLM's. Clients and measurements are not here."""
