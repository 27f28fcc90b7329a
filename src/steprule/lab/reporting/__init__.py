"""Charts as SVG text, and the page of a race, of trainings or of measured steps."""
