"""What an export holds: its graphs, precisions and data files, on the disk or on the Hub, and its architecture."""
