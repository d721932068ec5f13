"""The paper's claims, tested on what runs here: sweeps, statistical verdicts, plots, and the report made of them."""
