"""Files, runs, the hub, endpoints, progress, errors: what every layer stands on."""
