package services

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"memsync/strategies/backend/cassandra"
	"memsync/strategies/region"
)

// Apache Cassandra as its Maven artifacts, and the Maven plugin that fetches them.
const (
	cassandraVersion = "5.0.5"
	mavenDependency  = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1"
	// javaMajor is the Java that Cassandra 5 runs on: later ones lack the security manager that it sets.
	javaMajor = "17"
)

// cassandraServer is a cluster of one node with a small heap.
func cassandraServer() kind {
	return kind{
		name: "cassandra", start: 3 * time.Minute, ports: 2, stop: 20 * time.Second,
		find: func(ctx context.Context, log func(string)) (string, error) {
			if _, err := java(ctx); err != nil {
				return "", err
			}
			return jars(ctx, log)
		},
		version: func(context.Context, string) string { return "cassandra " + cassandraVersion },
		command: func(program, dir string, e Endpoint, ports []string) (*exec.Cmd, error) {
			run, err := java(context.Background())
			if err != nil {
				return nil, err
			}
			host, port, err := net.SplitHostPort(e.Addr)
			if err != nil {
				return nil, err
			}
			conf, logs := filepath.Join(dir, "cassandra.yaml"), filepath.Join(dir, "logback.xml")
			if err := os.WriteFile(conf, cassandraConf(dir, host, port, ports[1]), 0o600); err != nil {
				return nil, err
			}
			if err := os.WriteFile(logs, []byte(cassandraLogs), 0o600); err != nil {
				return nil, err
			}
			args := []string{
				"-Xms256m", "-Xmx512m", "-Xss384k", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-XX:+PerfDisableSharedMem",
				"-Djava.net.preferIPv4Stack=true", "-Djdk.attach.allowAttachSelf=true", "-Dio.netty.tryReflectionSetAccessible=true",
				"-Djava.io.tmpdir=" + dir, "-Djna.tmpdir=" + dir, "-Duser.home=" + dir,
				"-Dcassandra.config=file://" + conf, "-Dcassandra.storagedir=" + dir, "-Dlogback.configurationFile=" + logs,
				// One node has nobody to wait for, and its first role need not be made with delay.
				"-Dcassandra.skip_wait_for_gossip_to_settle=0", "-Dcassandra.ring_delay_ms=1", "-Dcassandra.superuser_setup_delay_ms=0",
				"-Dcassandra.auth_bcrypt_gensalt_log2_rounds=4",
			}
			for _, p := range exportedToCassandra() {
				args = append(args, "--add-exports="+p+"=ALL-UNNAMED")
			}
			for _, p := range openedToCassandra() {
				args = append(args, "--add-opens="+p+"=ALL-UNNAMED")
			}
			return exec.Command(run, append(args, "-cp", filepath.Join(program, "*"), "org.apache.cassandra.service.CassandraDaemon")...), nil
		},
		ready: func(ctx context.Context, n Net, e Endpoint) error {
			c, err := n.Dial(ctx, "tcp", e.Addr) // cheaper than the driver while nobody listens
			if err != nil {
				return err
			}
			c.Close()
			return cassandra.TakeOver(ctx, cassandra.Options{Addr: e.Addr, User: e.User, Password: e.Password, Keyspace: e.Bucket, Dial: n.Dial})
		},
	}
}

// exportedToCassandra and openedToCassandra are what Cassandra uses of the JDK's
// insides; without, Java 17 refuses it (Cassandra's conf/jvm17-server.options).
func exportedToCassandra() []string {
	return []string{"java.base/jdk.internal.misc", "java.base/java.lang.ref", "java.management.rmi/com.sun.jmx.remote.internal.rmi",
		"java.rmi/sun.rmi.registry", "java.rmi/sun.rmi.server", "java.sql/java.sql", "jdk.attach/sun.tools.attach", "jdk.unsupported/sun.misc"}
}

func openedToCassandra() []string {
	var p []string
	for _, in := range []string{"java.io", "java.lang", "java.lang.module", "java.lang.reflect", "java.util", "jdk.internal.loader",
		"jdk.internal.math", "jdk.internal.module", "jdk.internal.ref", "jdk.internal.reflect", "jdk.internal.util.jar", "sun.nio.ch"} {
		p = append(p, "java.base/"+in)
	}
	return append(p, "jdk.management/com.sun.management.internal")
}

// cassandraConf is the configuration of the node: everything below dir, on
// loopback, passwords asked for.
func cassandraConf(dir, host, port, storage string) []byte {
	return fmt.Appendf(nil, `cluster_name: memsync
num_tokens: 1
partitioner: org.apache.cassandra.dht.Murmur3Partitioner
endpoint_snitch: SimpleSnitch
seed_provider:
  - class_name: org.apache.cassandra.locator.SimpleSeedProvider
    parameters:
      - seeds: "%[2]s:%[4]s"
listen_address: %[2]s
rpc_address: %[2]s
storage_port: %[4]s
native_transport_port: %[3]s
authenticator: PasswordAuthenticator
authorizer: CassandraAuthorizer
role_manager: CassandraRoleManager
commitlog_sync: periodic
commitlog_sync_period: 10s
memtable_heap_space: 64MiB
memtable_offheap_space: 256MiB
memtable_allocation_type: offheap_buffers
auto_snapshot: false
data_file_directories: ["%[1]s/data"]
commitlog_directory: "%[1]s/commitlog"
saved_caches_directory: "%[1]s/saved_caches"
hints_directory: "%[1]s/hints"
cdc_raw_directory: "%[1]s/cdc_raw"
`, dir, host, port, storage)
}

const cassandraLogs = `<configuration>
  <appender name="out" class="ch.qos.logback.core.ConsoleAppender"><encoder><pattern>%-5level %d{HH:mm:ss.SSS} %msg%n</pattern></encoder></appender>
  <root level="WARN"><appender-ref ref="out"/></root>
</configuration>
`

// java returns the program of a Java that Cassandra runs on.
func java(ctx context.Context) (string, error) {
	var tried []string
	if home := os.Getenv("JAVA_HOME"); home != "" {
		tried = append(tried, filepath.Join(home, "bin", "java"))
	}
	if p, err := exec.LookPath("java"); err == nil {
		tried = append(tried, p)
	}
	found, _ := filepath.Glob("/usr/lib/jvm/java-" + javaMajor + "-*/bin/java")
	var seen []string
	for _, p := range append(tried, found...) {
		out, err := exec.CommandContext(ctx, p, "-version").CombinedOutput()
		if err != nil {
			continue
		}
		line, _, _ := strings.Cut(string(out), "\n")
		if strings.Contains(line, `"`+javaMajor+`.`) {
			return p, nil
		}
		if line = strings.TrimSpace(line); !slices.Contains(seen, line) {
			seen = append(seen, line)
		}
	}
	what := "no Java is here"
	if len(seen) > 0 {
		what = "here is " + strings.Join(seen, ", ")
	}
	return "", fmt.Errorf("cassandra %s runs on Java %s, %s (apt-get install openjdk-%s-jre-headless): %w", cassandraVersion, javaMajor, what, javaMajor, region.ErrNotSupported)
}

// fetchTime bounds fetching Cassandra and what it needs, some 70 MB.
const fetchTime = 10 * time.Minute

// jars returns the folder of Cassandra's artifacts, fetched once into the user's cache.
func jars(ctx context.Context, log func(string)) (string, error) {
	dir, err := cached("cassandra-" + cassandraVersion)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	maven, err := exec.LookPath("mvn")
	if err != nil {
		return "", fmt.Errorf("cassandra %s is not fetched yet, and there is no Maven to fetch it (apt-get install maven): %w", cassandraVersion, region.ErrNotSupported)
	}
	log("fetching cassandra " + cassandraVersion + " into the user cache (once)")
	return dir, into(dir, func(tmp string) (string, error) {
		pom := fmt.Sprintf(`<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
<groupId>memsync</groupId><artifactId>cassandra</artifactId><version>1</version>
<dependencies><dependency><groupId>org.apache.cassandra</groupId><artifactId>cassandra-all</artifactId><version>%s</version></dependency></dependencies>
</project>
`, cassandraVersion)
		if err := os.WriteFile(filepath.Join(tmp, "pom.xml"), []byte(pom), 0o600); err != nil {
			return "", err
		}
		ctx, cancel := context.WithTimeout(ctx, fetchTime)
		defer cancel()
		lib := filepath.Join(tmp, "lib")
		c := exec.CommandContext(ctx, maven, "-B", "-q", mavenDependency+":copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory="+lib)
		c.WaitDelay = time.Second // what it started may hold its output
		c.Dir = tmp
		if out, err := c.CombinedOutput(); err != nil {
			const most = 500 // Maven says much more
			out = bytes.TrimSpace(out)
			return "", fmt.Errorf("mvn, fetching org.apache.cassandra:cassandra-all:%s: %w: %s: %w", cassandraVersion, err, out[:min(most, len(out))], region.ErrNotSupported)
		}
		return lib, nil
	})
}
