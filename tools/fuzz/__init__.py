"""Problems drawn over the whole contract, in several processes: `python -m tools.fuzz`."""
