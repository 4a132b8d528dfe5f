"""Check and measure on one device what tests cannot show without it: one table, most important first."""
