"""What every study uses: files, results, the environment, statistics, figures, the command line."""
