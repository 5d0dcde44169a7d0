package results

// Better says which direction of a metric is an improvement.
type Better string

// The directions.
const (
	Higher  Better = "higher"
	Lower   Better = "lower"
	Neither Better = "neither" // describes the run; not compared
)

// Metric is the definition of a metric.
type Metric struct {
	Name   string
	Unit   string // base unit: s, B, B/s, bit/s, count, ratio
	Better Better
	Exact  bool   // the same in every run of a cell: a difference needs no statistics
	From   string // start event, or what is counted from when
	To     string // stop event
	Doc    string
}

// metrics is the only list of metrics: rows, docs and comparisons know no other.
var metrics = [...]Metric{
	{"open_latency", "s", Lower, false, "Mount is called", "the attachment is usable in the workload", "How long opening takes; where the daemon answers the faults of the workload's memory, until it does."},
	{"latency_first_chunk", "s", Lower, false, "first load after open, in the second page", "it returns", "First-chunk latency, on the page that the thesis measured."},
	{"throughput", "B/s", Higher, false, "first load after open", "last byte copied out", "Region bytes by time."},
	{"time_to_last_byte", "s", Lower, false, "open start", "last byte copied out, of those that the cell asks for", "What a user waits who opens a region and reads all of it. Absent where the budget ended before."},
	{"time_to_first_result", "s", Lower, false, "open start", "the program's first step has ended", "Access program:NAME: what its user waits for the first useful result, opening included."},
	{"time_to_result", "s", Lower, false, "open start", "the program's last step has ended", "Access program:NAME: the same of all that is asked of it. Absent where the budget ended before."},
	{"stall_time", "s", Lower, false, "the first line of output", "the program's end", "Access program:NAME, where its output is looked at with a rate, as the frames of a film: how long who looks had to wait, together."},
	{"link_utilisation", "ratio", Higher, false, "open start", "last byte copied out", "Op read: bytes_done, or payload_bytes where those are fewer (what crossed in vain does not count, nor what did not cross), by the time from open to the last byte, also of a run that its budget ended; divided by floor_tcp. Op migrate: the same of the bulk phase."},
	{"rate_utilisation", "ratio", Higher, false, "open start", "last byte copied out", "As link_utilisation, in bits, divided by the configured rate."},
	{"fault_latency_p50", "s", Lower, false, "load", "it returns", "Median over the loads of the run, from an HDR histogram."},
	{"fault_latency_p99", "s", Lower, false, "load", "it returns", "99th percentile over the loads of the run."},
	{"fault_latency_p999", "s", Lower, false, "load", "it returns", "99.9th percentile over the loads of the run."},
	{"fault_latency_max", "s", Lower, false, "load", "it returns", "Slowest load of the run."},
	{"downtime", "s", Lower, false, "last write accepted at the source", "first write accepted at the destination", "Sum of the four downtime parts."},
	{"downtime_suspend", "s", Lower, false, "last write accepted at the source", "the writer is suspended", "Part of downtime."},
	{"downtime_flush", "s", Lower, false, "the writer is suspended", "its stores are flushed", "Part of downtime."},
	{"downtime_handover", "s", Lower, false, "stores are flushed", "the destination owns the region", "Part of downtime."},
	{"downtime_pull", "s", Lower, false, "the destination owns the region", "first write accepted there", "Part of downtime: dirty chunks pulled because they were needed at once."},
	{"standstill", "s", Lower, false, "the application has stopped at the source", "first write accepted at the destination", "downtime without what the application did not write by itself before it was stopped."},
	{"blocktime", "s", Lower, false, "the destination takes over", "end of the run", "Sum of the workload's waits in faults after the hand-over."},
	{"blocktime_max", "s", Lower, false, "the destination takes over", "end of the run", "Longest single wait after the hand-over."},
	{"time_to_90", "s", Lower, false, "the destination takes over", "the workload reaches 90 % of its throughput before", "Recovery after a migration."},
	{"total_time", "s", Lower, false, "command", "the source may exit (migration), the destination is equal (sync)", "Duration of the whole action."},
	{"downtime_foreseen", "s", Neither, false, "the decision to finalise", "the application runs at the destination", "What finalize=adaptive estimated the downtime to be."},
	{"downtime_unmet", "count", Lower, false, "command", "the decision to finalise", "1 where max_downtime could not be kept to or no quiet phase was found, and the source's application was stopped all the same."},
	{"postponed", "s", Neither, false, "the share that was asked for is at the destination", "the decision to finalise", "How long finalize=cycle or quiet waited for a quiet phase of the application."},
	{"throttle_rate", "B/s", Higher, false, "command", "the decision to finalise", "Lowest rate that unmet=throttle held the application down to; 0 where it was not."},
	{"local_25", "s", Lower, false, "command", "25 % of the region is at the destination", "Local availability over time: bytes that are there and not known to be out of date."},
	{"local_50", "s", Lower, false, "command", "50 % of the region is at the destination", "Local availability over time."},
	{"local_75", "s", Lower, false, "command", "75 % of the region is at the destination", "Local availability over time."},
	{"local_90", "s", Lower, false, "command", "90 % of the region is at the destination", "Local availability over time."},
	{"local_100", "s", Lower, false, "command", "the whole region is at the destination", "Local availability over time; for the first time, if it is written meanwhile."},
	{"final_bytes", "B", Lower, false, "last look for dirty pages", "the application is suspended", "Pages that the last answer before the hand-over named as written."},
	{"needed_bytes", "B", Lower, false, "the application is suspended", "the source may exit", "Bytes that were not at the destination, or out of date there, when the application stopped."},
	{"dirtied_bytes", "B", Neither, false, "command", "the application is suspended", "Bytes of chunks that were written after they were pulled."},
	{"writes", "count", Neither, false, "the application starts", "end of the run", "Numbered writes of the application that migrates, at both hosts."},
	{"sync_latency", "s", Lower, false, "last touch returned", "the source has what was written", "How long flush and Sync take after the work."},
	{"staleness", "s", Lower, false, "write at the source", "visible at the destination", "Age of what the destination sees; median over the writes of the run."},
	{"staleness_p99", "s", Lower, false, "write at the source", "visible at the destination", "99th percentile over the writes of the run."},
	{"staleness_max", "s", Lower, false, "write at the source", "visible at the destination", "Oldest of what the destination saw."},
	{"round_tx_bytes", "B", Lower, false, "a round is asked for", "the destination is equal", "Sent at the source's interface in a round, L3 bytes; median over the rounds of the run."},
	{"round_rx_bytes", "B", Lower, false, "a round is asked for", "the destination is equal", "Received at the source's interface in a round; median over the rounds of the run."},
	{"round_tx_bytes_max", "B", Lower, false, "a round is asked for", "the destinations are equal", "Sent in a round by the host that sent most, source or destination, L3 bytes; median over the rounds of the run."},
	{"round_tx_bytes_others", "B", Lower, false, "a round is asked for", "the destinations are equal", "Sent in a round by all destinations together, acknowledgements among it; median over the rounds of the run."},
	{"first_equal_time", "s", Lower, false, "a round is asked for", "the first of several destinations is equal", "Median over the rounds of the run."},
	{"last_equal_time", "s", Lower, false, "a round is asked for", "the last of several destinations is equal", "As total_time, without the way back to the source; median over the rounds of the run."},
	{"event_round_time", "s", Lower, false, "a round is asked for", "source and destinations know that they are equal", "The round in which event= happens to the last destination; that round is in no other metric of rounds."},
	{"event_others_time", "s", Lower, false, "a round is asked for", "the last of the other destinations is equal", "The same round without the destination that the event happens to."},
	{"join_time", "s", Lower, false, "Mount is called", "the attachment is usable in the workload", "Opening of a destination that comes late or again, while rounds go on."},
	{"poll_load", "ratio", Lower, false, "the source begins to poll", "the last write is visible", "CPU seconds of the source a second while it polls."},
	{"store_time", "s", Lower, false, "the writer's first store of a round", "its last", "What the stores between two rounds cost the writer; median over the rounds of the run."},
	{"detection_time", "s", Lower, false, "the source begins to look for changes", "it knows the chunks", "One look for changes; median over the rounds of the run."},
	{"msync_time", "s", Lower, false, "the source begins to look for changes", "it begins to hash", "Part of detection_time: what it takes to write the region back, so that its modification time moves again; median over the rounds of the run."},
	{"arm_time", "s", Lower, false, "the source is given the writer's mapping", "its pages are write-protected", "What it costs once to be told of stores (dirty=pagemap, uffd-wp)."},
	{"hash_rate", "B/s", Higher, false, "the source begins to look for changes", "it knows the chunks", "Region bytes by detection_time, where everything is hashed."},
	{"floor_read", "B/s", Neither, false, "first load", "last load", "Yardstick: the region's mapping read by as many workers as hash it, best of 3."},
	{"hash_ratio", "ratio", Higher, false, "the source begins to look for changes", "it knows the chunks", "hash_rate by floor_read."},
	{"rounds", "count", Neither, false, "open start", "end of the measured section", "Rounds that a source of hashsync ended."},
	{"candidate_bytes", "B", Lower, false, "open start", "end of the measured section", "Bytes that the detection named as perhaps changed."},
	{"changed_bytes", "B", Neither, false, "open start", "end of the measured section", "Bytes of chunks that had changed."},
	{"delta_bytes", "B", Lower, false, "open start", "end of the measured section", "Bytes of deltas, once whatever the number of destinations."},
	{"sent_bytes", "B", Lower, false, "open start", "end of the measured section", "Bytes of pieces queued, for all destinations."},
	{"filled_bytes", "B", Lower, false, "open start", "end of the measured section", "Region bytes sent whole to destinations that lacked them."},
	{"digest_mismatches", "count", Lower, false, "open start", "end of the measured section", "Rounds after which a destination had another digest, and was repaired."},
	{"wire_tx_bytes", "B", Lower, false, "open start", "teardown", "Sent at the source's interface, L3 bytes as segmented."},
	{"wire_rx_bytes", "B", Lower, false, "open start", "teardown", "Received at the source's interface, L3 bytes as segmented."},
	{"wire_tx_dropped", "count", Lower, false, "open start", "teardown", "Packets from the source that the link did not carry: lost by its profile, or more than its queue held."},
	{"wire_rx_dropped", "count", Lower, false, "open start", "teardown", "The same of packets to the source."},
	{"cpu_source", "s", Lower, false, "first load after open", "last byte copied out", "User and system time of the source."},
	{"cpu_daemon", "s", Lower, false, "first load after open", "last byte copied out", "User and system time of the daemon."},
	{"cpu_workload", "s", Lower, false, "first load after open", "last byte copied out", "User and system time of the workload."},
	{"cpu_per_byte", "s/B", Lower, false, "first load after open", "last byte copied out", "User and system time of source, daemon and workload together, by bytes_done."},
	{"cpu_per_byte_source", "s/B", Lower, false, "Mount is called", "last byte copied out", "User and system time of the source, opening included, by bytes_done."},
	{"cpu_per_byte_daemon", "s/B", Lower, false, "Mount is called", "last byte copied out", "User and system time of the daemon, opening included, by bytes_done."},
	{"cpu_per_byte_workload", "s/B", Lower, false, "Mount is called", "last byte copied out", "User and system time of the workload, opening included, by bytes_done."},
	{"cpu_writer", "s", Lower, false, "first load after open", "last byte copied out", "User and system time of the writer at the source (op sync)."},
	{"bytes_done", "B", Higher, false, "first load after open", "end of the measured section", "Region bytes that the workload touched before its budget ended."},
	{"payload_bytes", "B", Lower, false, "open start", "end of the measured section", "Region bytes that crossed the link, without protocol."},
	{"preemptive_pull_bytes", "B", Higher, false, "open start", "the attachment is usable", "Bytes already local when open returned."},
	{"resent_bytes", "B", Lower, false, "open start", "teardown", "Region bytes that crossed the link more than once."},
	{"writer_slowdown", "ratio", Lower, false, "the strategy tracks the writer", "it stops", "Time of the writer's work divided by its time untracked."},
	{"pause", "s", Lower, false, "the writer is stopped", "it goes on", "Longest stop of a writer for a snapshot or a round: of its writes from the beginning to the end of it, the slowest; median over those of the run."},
	{"pause_max", "s", Lower, false, "the writer is stopped", "it goes on", "Longest of these stops, also those for which the scheduler is to blame."},
	{"pause_by_fork", "ratio", Lower, false, "the writer is stopped", "it goes on", "pause by floor_fork of the same run."},
	{"freeze", "s", Lower, false, "the first page is protected", "the last one is", "Longest time in which an image's state was fixed by protecting the writer's mapping."},
	{"snapshot_time", "s", Lower, false, "an image is asked for", "it is on the disk", "Median over the images of the run."},
	{"snapshot_bytes", "B", Lower, false, "an image is asked for", "it is on the disk", "Bytes written to the image file; median over the images of the run."},
	{"snapshots", "count", Higher, false, "open start", "end of the measured section", "Images that had something new."},
	{"starved", "count", Lower, false, "open start", "end of the measured section", "How often the writer had overwritten what the host had not read (queue)."},
	{"writer_rate", "B/s", Higher, false, "the writer's first write", "its last", "Bytes that the writer wrote while images were taken."},
	{"rss_source", "B", Lower, false, "open start", "end of the measured section", "Peak resident memory of the source, and of programs that it started and that still run."},
	{"rss_daemon", "B", Lower, false, "open start", "end of the measured section", "Peak resident memory of the daemon, and of programs that it started and that still run."},
	{"rss_workload", "B", Lower, false, "open start", "end of the measured section", "Peak resident memory of the workload, and of programs that it started and that still run."},
	{"rss_writer", "B", Lower, false, "open start", "end of the measured section", "Peak resident memory of the writer at the source."},
	{"minor_faults_source", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the source that needed no I/O."},
	{"minor_faults_daemon", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the daemon that needed no I/O."},
	{"minor_faults_workload", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the workload that needed no I/O."},
	{"minor_faults_writer", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the writer at the source (op sync) that needed no I/O."},
	{"major_faults_source", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the source that waited for I/O."},
	{"major_faults_daemon", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the daemon that waited for I/O."},
	{"major_faults_workload", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the workload that waited for I/O."},
	{"major_faults_writer", "count", Lower, false, "first load after open", "last byte copied out", "Page faults of the writer at the source (op sync) that waited for I/O."},
	{"context_switches_source", "count", Lower, false, "first load after open", "last byte copied out", "Voluntary and involuntary switches of the source."},
	{"context_switches_daemon", "count", Lower, false, "first load after open", "last byte copied out", "Voluntary and involuntary switches of the daemon."},
	{"context_switches_workload", "count", Lower, false, "first load after open", "last byte copied out", "Voluntary and involuntary switches of the workload."},
	{"context_switches_writer", "count", Lower, false, "first load after open", "last byte copied out", "Voluntary and involuntary switches of the writer at the source (op sync)."},
	{"demand_requests", "count", Lower, false, "open start", "end of the measured section", "Requests made because the workload waited."},
	{"demand_bytes", "B", Lower, false, "open start", "end of the measured section", "Bytes of demand requests."},
	{"prefetch_requests", "count", Neither, false, "open start", "end of the measured section", "Requests made ahead of the workload."},
	{"prefetch_bytes", "B", Neither, false, "open start", "end of the measured section", "Bytes of prefetch requests."},
	{"local_requests", "count", Neither, false, "open start", "end of the measured section", "Requests of the device answered without the source."},
	{"local_request_bytes", "B", Neither, false, "open start", "end of the measured section", "Bytes of local requests."},
	{"local_bytes", "B", Neither, false, "open start", "end of the measured section", "Region bytes that the destination's cache holds, in whole chunks."},
	{"bytes_resident", "B", Neither, false, "open start", "end of the measured section", "Region bytes that a server of userfaultfd has filled."},
	{"dirty_bytes", "B", Neither, false, "open start", "end of the measured section", "Bytes in chunks that wait to be pushed."},
	{"zero_bytes", "B", Neither, false, "open start", "end of the measured section", "Region bytes that did not cross the link since they were known to be zero."},
	{"duplicate_bytes", "B", Neither, false, "open start", "end of the measured section", "Region bytes that did not cross the link since the cache had a chunk of the same digest."},
	{"dropped_pull_bytes", "B", Lower, false, "open start", "end of the measured section", "Bytes pulled in vain: written, or pulled by another, meanwhile."},
	{"evicted_bytes", "B", Neither, false, "open start", "end of the measured section", "Bytes that left a bounded cache to make room, in whole chunks."},
	{"version_checks", "count", Neither, false, "open start", "open end", "Looks at the source's version; 0 where the source has none, or nobody asks (on_change)."},
	{"source_changes", "count", Lower, false, "open start", "open end", "Changes of the source by others that these looks showed."},
	{"recovered_bytes", "B", Neither, false, "open start", "open end", "Bytes that an earlier mount had not pushed and the journal of its cache brought back, in whole chunks."},
	{"slowdown", "ratio", Lower, false, "first touch after the warm-up", "last touch returned", "Time of the touches / time of the same touches, with the same pauses, in memory that is all local."},
	{"repeated_requests", "count", Lower, false, "open start", "end of the measured section", "Requests made again because the first took long."},
	{"pull_retries", "count", Lower, false, "open start", "end of the measured section", "Background pulls that failed and were tried again."},
	{"push_failures", "count", Lower, false, "open start", "end of the measured section", "Background pushes that failed; their chunks stay dirty."},
	{"faults", "count", Neither, false, "open start", "end of the measured section", "Events of userfaultfd that the daemon answered."},
	{"faults_coalesced", "count", Neither, false, "open start", "end of the measured section", "Of these, those answered by a fill that was under way."},
	{"faults_trip", "count", Neither, false, "open start", "end of the measured section", "Of these, those on a page held back to pace the prefetch."},
	{"fault_errors", "count", Lower, false, "open start", "end of the measured section", "Reads of the source that failed while a fault waited."},
	{"device_reads", "count", Neither, false, "open start", "end of the measured section", "Read requests that the device served."},
	{"device_writes", "count", Neither, false, "open start", "end of the measured section", "Write requests that the device served."},
	{"reconnects", "count", Lower, false, "open start", "end of the measured section", "Connections to the source that took the place of lost ones."},
	{"device_flushes", "count", Neither, false, "open start", "end of the measured section", "Flush requests that the device served."},
	{"device_interrupts", "count", Neither, false, "open start", "end of the measured section", "Signals that reached a thread of the workload as it waited for the device."},
	{"device_errors", "count", Lower, false, "open start", "end of the measured section", "Requests of the device that ended in an error."},
	{"push_requests", "count", Lower, false, "open start", "teardown", "Requests that wrote back to the source."},
	{"push_bytes", "B", Lower, false, "open start", "teardown", "Bytes of push requests."},
	{"read_per_written", "ratio", Lower, false, "open start", "the source has all", "Bytes pulled by bytes that the workload wrote: what read-modify-write costs."},
	{"pushed_per_written", "ratio", Lower, false, "open start", "the source has all", "Bytes pushed by bytes that the workload wrote: chunks are pushed whole."},
	{"rtt_measured", "s", Neither, false, "echo sent", "echo received", "Median of the echoes before and after the run."},
	{"rate_measured", "bit/s", Neither, false, "first packet of a paced blast", "last packet received", "Receiver's L2 rate of the link, loss set to 0."},
	{"tcp_goodput", "B/s", Neither, false, "connect", "last byte received", "One bulk TCP stream on the link; recorded, never a gate."},
	{"steal_time", "s", Neither, false, "first load after open", "last byte copied out", "CPU time that the hypervisor took, all CPUs."},
	{"harness_overhead", "s", Lower, false, "the run begins", "it is recorded", "Duration of the run without the floors and without its measured section: open to the last byte (write, mixed: to the end of Sync); sync: open, rounds, pulses; migrate: command to the end of settle; snapshot: open to the writer's last write. So processes, content, the first touch of memory, echoes, the wait for an idle link, verification and teardown count."},
	{"floor_map", "B/s", Neither, false, "first load", "last byte copied out", "Yardstick: mapped read of a cached tmpfs file, 4 KiB pages, cold page tables, copied out page by page; of the region's size, at most 256 MiB."},
	{"floor_fill", "B/s", Neither, false, "first store", "last byte stored", "Yardstick: copy into fresh 4 KiB anonymous pages with the cell's number of threads; of the region's size, at most 256 MiB."},
	{"floor_tcp", "B/s", Neither, false, "connect is called", "last byte received", "Yardstick: one bulk stream of as many bytes from source to daemon, the same two processes, link, congestion control and sysctls. One is sent before each of the first 3 runs of a link, size and placement, between the runs of other cells; a run has the median of those sent until then."},
	{"floor_fork", "s", Neither, false, "fork is called", "it returns in the parent", "Yardstick: fork of a process with private memory of the region's size in pages of the same size, all touched; median of 5."},
	{"floor_wake", "s", Neither, false, "write to a pipe", "answer read from the other", "Yardstick: ping-pong between two threads placed like daemon and workload."},
	{"floor_rr", "s", Neither, false, "request sent", "4 KiB reply received", "Yardstick: request and reply over one TCP connection, raw sockets, placed like source and daemon."},
	{RunMetric, "s", Neither, false, "the run begins", "its rows are made", "Closes the run; its duration. Empty where the status is not ok."},
}

// Metrics returns the table of metrics.
func Metrics() []Metric { return append([]Metric(nil), metrics[:]...) }

// MetricByName returns the definition of a metric.
func MetricByName(name string) (Metric, bool) {
	for _, m := range metrics {
		if m.Name == name {
			return m, true
		}
	}
	return Metric{}, false
}
