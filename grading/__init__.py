"""The parts of rewards.py: find an answer (formats), read it (letters, latex), run programs (sandbox), and check RFT's
equations (equations). Left out: verdicts, which only rewards.py gives."""
