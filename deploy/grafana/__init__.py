"""The two Grafana dashboards, built by code. `python -m deploy.grafana.build` writes them to `dashboards/`."""
