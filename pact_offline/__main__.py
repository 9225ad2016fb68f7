from pact_offline.cli import main

main()
