"""The networks of pi-0 and pi-0.5, small or as published, and what a published checkpoint's folder holds."""
