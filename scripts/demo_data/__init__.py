"""The script that made the demo's data, `preftree/demo/data/`: `python -m scripts.demo_data.build --out DIR`."""
