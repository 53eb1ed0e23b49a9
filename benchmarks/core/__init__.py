"""What every study uses: files and results, the environment, statistics, figures, values from the command line."""
