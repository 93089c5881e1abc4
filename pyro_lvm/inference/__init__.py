"""Fitting: the SVI loop and the record it leaves."""
